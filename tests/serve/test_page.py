"""The web page in a real browser, headless, on the API with a stand-in for what makes videos."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from api_service import ALICE, KEYS, Files, running
from selenium.webdriver import Chrome, ChromeOptions, ChromeService, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(not CHROMIUM or not DRIVER, reason="needs chromium and chromedriver, as Debian has them"),
]

WITHIN_S = 30
PROMPT = "A red circle moving right on a white background."
PRESS_THREE_TIMES = """
    const press = new KeyboardEvent("keydown", {key: "Enter", ctrlKey: true, bubbles: true});
    for (let i = 0; i < 3; i++) document.getElementById("prompt").dispatchEvent(press);
"""
# The next POST arrives, and its answer does not.
LOSE_AN_ANSWER = """
    const real = window.fetch;
    window.fetch = async (path, options = {}) => {
        const answer = await real(path, options);
        if (options.method !== "POST") return answer;
        window.fetch = real;
        throw new TypeError("the connection broke");
    };
"""
SEND_A_FORM = """
    const form = Object.assign(document.createElement("form"), {
        action: arguments[0], method: "POST", enctype: "multipart/form-data"});
    form.append(Object.assign(document.createElement("input"), {name: "prompt", value: "spam"}));
    document.body.append(form);
    form.submit();
"""


class Page:
    """What a user sees and does. Its methods block: they are called in a thread."""

    def __init__(self, driver: Chrome, url: str) -> None:
        self.driver = driver
        driver.get_log("browser")  # of the pages before: what is read later is this one's alone
        driver.get(url)

    def part(self, name: str) -> WebElement:
        return self.driver.find_element(By.ID, name)

    def wait_for(self, what: Callable[["Page"], Any]) -> None:
        WebDriverWait(self.driver, WITHIN_S, poll_frequency=0.05).until(lambda _: what(self))

    def says(self, name: str, words: str) -> None:
        self.wait_for(lambda page: words in page.part(name).text)


@pytest.fixture(scope="module")
def driver() -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=900,1000"):
        options.add_argument(argument)
    chrome = Chrome(options, ChromeService(DRIVER))
    yield chrome
    chrome.quit()


@pytest.fixture
async def service(tmp_path: Path, files: Files) -> AsyncIterator[Any]:
    async with running(tmp_path, files) as service:
        yield service


async def num_videos(service: Any) -> int:
    return len((await service.jobs.list("local")).jobs)


async def test_a_video_is_asked_for_watched_and_played(driver: Chrome, service: Any) -> None:
    def ask() -> Page:
        page = Page(driver, service.url)
        page.part("prompt").send_keys(PROMPT)
        driver.execute_script(PRESS_THREE_TIMES)
        page.says("status", "Waiting, next in line")
        return page

    def see(page: Page) -> None:
        page.says("status", "Done")
        page.wait_for(lambda page: driver.execute_script("return document.querySelector('video').readyState") >= 2)
        assert driver.execute_script("return document.querySelector('video').videoWidth") > 0
        assert page.part("title").text == PROMPT
        assert page.part("download").is_displayed()
        assert not page.part("cancel").is_displayed()
        page.wait_for(lambda page: driver.find_elements(By.CSS_SELECTOR, "#recent img"))
        assert page.part("problem").text == ""

    page = await asyncio.to_thread(ask)
    assert await num_videos(service) == 1
    async with service.working(step_s=0.05):
        await asyncio.to_thread(see, page)
    assert not [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.mark.parametrize("escapes", [True, False])
async def test_a_prompt_of_any_lines_is_watched_to_its_end(
    driver: Chrome, service: Any, monkeypatch: pytest.MonkeyPatch, escapes: bool
) -> None:
    prompt = "A red circle\u2028moving right\u2029on white."
    if not escapes:  # as a service may that is older than its page
        monkeypatch.setattr(json, "dumps", partial(json.dumps, ensure_ascii=False))
    await service.create(prompt)

    def see() -> None:
        page = Page(driver, service.url)
        page.says("status", "Done")
        assert driver.execute_script("return document.getElementById('title').textContent") == prompt

    async with service.working(step_s=0.05):
        await asyncio.to_thread(see)


async def test_a_video_whose_answer_was_lost_is_not_made_twice(driver: Chrome, service: Any) -> None:
    def ask() -> None:
        page = Page(driver, service.url)
        driver.execute_script(LOSE_AN_ANSWER)
        page.part("prompt").send_keys(PROMPT)
        page.part("make").click()
        page.says("problem", "cannot be reached")
        page.part("make").click()
        page.says("status", "Waiting")
        assert page.part("problem").text == ""

    await asyncio.to_thread(ask)
    assert await num_videos(service) == 1


async def test_a_cancel_that_did_not_get_through_can_be_tried_again(driver: Chrome, service: Any) -> None:
    await service.create(PROMPT)

    def cancel() -> None:
        page = Page(driver, service.url)
        page.says("status", "Waiting")
        driver.execute_script(
            "const real = window.fetch; window.fetch = () => { window.fetch = real; throw new TypeError() };"
        )
        page.part("cancel").click()
        page.says("problem", "cannot be reached")
        page.part("cancel").click()
        page.says("status", "Cancelled")

    await asyncio.to_thread(cancel)


async def test_a_page_of_another_site_cannot_have_a_video_made(driver: Chrome, service: Any) -> None:
    def send_a_form_from(host: str) -> str:
        driver.get(service.url.replace("127.0.0.1", host) + "/healthz")
        driver.execute_script(SEND_A_FORM, f"{service.url}/v1/videos")
        WebDriverWait(driver, WITHIN_S).until(lambda driver: driver.current_url.endswith("/v1/videos"))
        return driver.page_source

    assert "cross_site_request" in await asyncio.to_thread(send_a_form_from, "localhost")
    assert await num_videos(service) == 0
    assert "queued" in await asyncio.to_thread(send_a_form_from, "127.0.0.1")
    assert await num_videos(service) == 1


async def test_a_key_is_asked_for_until_it_is_one(driver: Chrome, tmp_path: Path, files: Files) -> None:
    async with running(tmp_path, files, keys=KEYS) as service:

        def enter() -> None:
            page = Page(driver, service.url)
            for given, refusal in (("schlüssel", "printable ASCII"), ("wrong", "key")):
                page.wait_for(
                    lambda page: page.part("key").is_displayed() and not page.part("key").get_property("value")
                )
                page.part("key").send_keys(given, Keys.ENTER)
                page.says("refusal", refusal)
            page.part("key").send_keys(ALICE, Keys.ENTER)
            page.wait_for(lambda page: not page.part("keyhole").is_displayed())
            page.says("empty", "None yet.")
            assert page.part("problem").text == ""

        await asyncio.to_thread(enter)
