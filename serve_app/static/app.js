// The web page: asks for a video, watches it being made, and plays it.

const isLive = (job) => job.status === "queued" || job.status === "in_progress";
const RECENT = 12;
const part = (id) => document.getElementById(id);

// Calls
/** What the service itself refused, with its own words. */
class Refused extends Error { isFinal = true; }

const isKey = (text) => /^[\x21-\x7e]+$/.test(text); // what a header can hold
let key = sessionStorage.getItem("key");
if (key !== null && !isKey(key)) key = null;
let asking = null; // one question, however many calls wait for its answer

async function call(path, options = {}) {
  for (;;) {
    const used = key;
    const headers = { ...options.headers, ...(used ? { authorization: `Bearer ${used}` } : {}) };
    const response = await fetch(path, { ...options, headers });
    if (response.ok) return response;
    const body = await response.json().catch(() => ({}));
    const message = body.error?.message ?? `the service answered ${response.status}`;
    const isFinal = response.status < 500 && response.status !== 429;
    if (response.status !== 401) throw Object.assign(new Refused(message), { isFinal });
    if (key === used) await (asking ??= askForKey(used ? message : "").finally(() => (asking = null)));
  }
}

async function askForKey(refusal) {
  const dialog = part("keyhole");
  part("key").value = "";
  part("refusal").textContent = refusal;
  dialog.returnValue = "";
  dialog.showModal();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  if (dialog.returnValue !== "use") throw new Refused("No API key was given: reload to give one.");
  const given = part("key").value.trim();
  if (!isKey(given)) return askForKey("An API key is printable ASCII only, without spaces.");
  key = given;
  sessionStorage.setItem("key", key);
}

const file = async (id, variant) => (await call(`v1/videos/${id}/content?variant=${variant}`)).blob();

/** The events of a stream. EventSource would do, could it send a key. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (text + value).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const lines = block.matchAll(/(?:^|\n)(\w+): ?([^\n]*)/g); // not ^, $ and a dot: in a prompt, they know more ends
      const event = Object.fromEntries(Array.from(lines, (line) => line.slice(1)));
      if (event.data) yield { ...event, data: JSON.parse(event.data) };
    }
  }
}

// The video in front
let shown = null; // its id
let watching = new AbortController();
let objectUrl = null;

async function show(job) {
  watching.abort();
  watching = new AbortController();
  shown = job.id;
  part("current").hidden = false;
  part("title").textContent = job.prompt;
  part("facts").innerText = `${job.size}, ${job.num_frames} frames, ${job.seconds} s, ${job.num_inference_steps} steps, seed ${job.seed}`;
  part("bar").removeAttribute("value");
  put(null);
  markCurrent();
  draw(job);
  if (isLive(job)) await watch(job.id, watching.signal);
}

async function watch(id, signal) {
  let last = null;
  while (!signal.aborted) {
    try {
      const headers = last ? { "last-event-id": last } : {};
      const response = await call(`v1/videos/${id}/events`, { signal, headers });
      if (response.status === 204) return draw(await (await call(`v1/videos/${id}`)).json());
      for await (const event of events(response.body)) {
        if (signal.aborted) return;
        last = event.id ?? last;
        tell(event.event, event.data);
        if (event.data.object === "video") return await refreshed(); // its last state
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error.isFinal) return say(error.message);
      say("Connection lost, trying again");
    }
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

function tell(name, data) {
  if (name === "progress") {
    const left = data.eta_s === null ? "" : `, about ${Math.max(1, Math.round(data.eta_s))} s left`;
    part("bar").value = data.progress;
    say("Making it", `step ${data.step} of ${data.num_steps}${left}`);
  } else if (name === "queued") say(data.position ? `Waiting, ${data.position} before it` : "Waiting, next in line");
  else if (name === "resumed") say(`Going on from step ${data.step}`);
  else if (name === "preview") put(element("img", { src: data.url, className: "preview", alt: "Preview" }));
  else draw(data);
}

function draw(job) {
  part("bar").hidden = !isLive(job);
  part("screen").hidden = !isLive(job) && job.status !== "completed";
  Object.assign(part("cancel"), { hidden: !isLive(job), disabled: false });
  part("download").hidden = true;
  if (job.status === "completed") play(job);
  else if (job.status === "failed") say(`Failed: ${job.error?.message ?? "for no known reason"}`);
  else if (job.status === "cancelled") say("Cancelled");
  else say(job.status === "queued" ? "Waiting" : "Making it");
}

async function play(job) {
  say("Fetching it");
  try {
    const blob = await file(job.id, "video");
    if (shown !== job.id) return;
    const url = URL.createObjectURL(blob);
    const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const playing = { controls: true, loop: true, muted: true, playsInline: true, autoplay: !calm };
    const [tag, properties] = blob.type.startsWith("image/") ? ["img", {}] : ["video", playing];
    put(element(tag, { src: url, ariaLabel: job.prompt, ...properties }), url);
    Object.assign(part("download"), { href: url, download: `${job.id}.${blob.type.split("/")[1]}`, hidden: false });
    say("Done");
  } catch (error) {
    if (shown === job.id) say(error.message);
  }
}

function put(screen, url = null) {
  part("screen").replaceChildren(...(screen ? [screen] : []));
  if (objectUrl) URL.revokeObjectURL(objectUrl);
  objectUrl = url;
}

function say(status, detail = "") {
  if (part("status").textContent !== status) part("status").textContent = status; // it is read aloud when it changes
  part("detail").textContent = detail;
}

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// The list
const pictures = new Map(); // promises of the URLs of thumbnails, by id
let listed, nextLook;

/** For those whose action has worked already: a list that cannot be had is asked for again. */
const refreshed = () => refresh().catch(() => {});

function lookAgain(isNeeded) {
  clearTimeout(nextLook);
  if (isNeeded) nextLook = setTimeout(refreshed, 3000);
}

async function refresh() {
  let data;
  try {
    ({ data } = await (await call(`v1/videos?limit=${RECENT}`)).json());
  } catch (error) {
    lookAgain(!error.isFinal);
    throw error;
  }
  lookAgain(data.some(isLive));
  const list = data.map((job) => `${job.id} ${job.status}`).join();
  if (list !== listed) {
    const focused = document.activeElement.id;
    part("recent").replaceChildren(...data.map(item));
    part("empty").hidden = data.length > 0;
    part(focused)?.focus();
    dropPictures(data);
    listed = list;
  }
  markCurrent();
  return data;
}

function item(job) {
  const picture = element("span", { className: "picture" });
  const caption = element("span", { className: "caption" }, job.prompt);
  const state = element("span", { className: "state" }, job.status.replace("_", " "));
  const open = element("button", { id: job.id, className: "open" }, picture, caption, state);
  const ariaLabel = `Remove: ${job.prompt}`;
  const remove = element("button", { id: `remove-${job.id}`, className: "remove", ariaLabel }, "×");
  open.onclick = () => attempt(async () => show(await (await call(`v1/videos/${job.id}`)).json()));
  remove.onclick = () => attempt(() => forget(job.id));
  if (job.status === "completed") addPicture(job.id, picture);
  return element("li", {}, open, remove);
}

async function addPicture(id, place) {
  if (!pictures.has(id)) pictures.set(id, file(id, "thumbnail").then(URL.createObjectURL));
  const picture = pictures.get(id);
  try {
    place.append(element("img", { src: await picture, alt: "" }));
  } catch {
    if (pictures.get(id) === picture) pictures.delete(id); // the next list asks again
  }
}

function dropPictures(jobs) {
  const kept = new Set(jobs.map((job) => job.id));
  for (const [id, picture] of pictures) {
    if (kept.has(id)) continue;
    pictures.delete(id);
    picture.then(URL.revokeObjectURL).catch(() => {});
  }
}

async function forget(id) {
  await call(`v1/videos/${id}`, { method: "DELETE" });
  if (shown === id) {
    watching.abort();
    shown = null;
    put(null);
    part("current").hidden = true;
  }
  await refreshed();
  part("prompt").focus();
}

function markCurrent() {
  for (const open of document.querySelectorAll(".open")) open.ariaCurrent = open.id === shown ? "true" : null;
}

// What the user does
async function attempt(action) {
  part("problem").textContent = "";
  try {
    return await action();
  } catch (error) {
    part("problem").textContent =
      error instanceof Refused ? error.message : "The service cannot be reached. Is it running? Try again.";
  }
}

let unanswered = null; // the body of a video that was asked for, and its key: asked for again, it is no second one

async function make() {
  if (part("make").disabled) return;
  part("make").disabled = true;
  try {
    const body = JSON.stringify({ prompt: part("prompt").value.trim() });
    if (unanswered?.body !== body) unanswered = { body, key: randomKey() };
    const headers = { "content-type": "application/json", "idempotency-key": unanswered.key };
    const job = await (await call("v1/videos", { method: "POST", headers, body })).json();
    unanswered = null;
    show(job);
    await refreshed();
  } catch (error) {
    if (error.isFinal) unanswered = null;
    throw error;
  } finally {
    part("make").disabled = false;
  }
}

/** randomUUID would do, were every page a secure context. */
const randomKey = () => Array.from(crypto.getRandomValues(new Uint32Array(4)), (word) => word.toString(36)).join("-");

async function cancel() {
  part("cancel").disabled = true;
  try {
    await call(`v1/videos/${shown}/cancel`, { method: "POST" });
  } catch (error) {
    part("cancel").disabled = false;
    throw error;
  }
}

part("form").addEventListener("submit", (event) => {
  event.preventDefault();
  attempt(make);
});
part("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.repeat) part("form").requestSubmit();
});
part("cancel").addEventListener("click", () => attempt(cancel));

attempt(async () => {
  const recent = await refresh();
  const first = recent.find(isLive) ?? recent[0];
  if (first) await show(first);
});
