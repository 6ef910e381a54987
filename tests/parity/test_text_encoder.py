"""The text encoder gives what OpenCLIP's and transformers' towers give; its tokens are OpenCLIP's."""

import copy

import open_clip
import pytest
import torch
from references import SMALL_TEXT_ENCODER, clip_text_model, random_network, relative_error
from torch.profiler import ProfilerActivity, profile

from t2v_core.config import ModelConfig
from t2v_core.errors import InvalidRequest
from t2v_core.text_encoder import TextEncoder, Tokenizer

PROMPTS = [
    "A panda eating bamboo on a rock.",
    "",
    "!",  # padding, in transformers' tokenizer
    "  It&amp;s   ﬁne — naïve “quotes” \u00e2\u0080\u0099 🐼 ",
    "ÉCLAIR 竹 🎋 one2three",
]


@pytest.fixture(scope="module")
def text_encoder():
    return random_network(TextEncoder, SMALL_TEXT_ENCODER)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_tokens_are_those_of_open_clip(prompt):
    assert torch.equal(Tokenizer(77)(prompt), open_clip.tokenize([prompt]))


def test_embeddings_are_those_of_transformers(text_encoder):
    reference = clip_text_model(ModelConfig(text_encoder=SMALL_TEXT_ENCODER), text_encoder.state_dict())
    ids = torch.cat([Tokenizer(77)(prompt) for prompt in PROMPTS])
    assert relative_error(text_encoder(ids), reference(ids).last_hidden_state) <= 1e-5


def test_embeddings_are_those_of_open_clip_before_its_last_layer(text_encoder):
    """OpenCLIP's own CLIP, image tower and all, with one layer more than we run."""
    config = SMALL_TEXT_ENCODER
    clip = open_clip.model.CLIP(
        embed_dim=64,
        vision_cfg={"layers": 1, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 32},
        text_cfg={"width": config.width, "heads": config.heads, "layers": config.layers + 1},
    ).eval()
    ours = {name.removeprefix("tower."): tensor for name, tensor in text_encoder.state_dict().items()}
    _, unexpected = clip.load_state_dict(ours, strict=False)
    assert not unexpected
    ids = Tokenizer(77)(PROMPTS[0])
    x = clip.token_embedding(ids) + clip.positional_embedding
    for block in clip.transformer.resblocks[:-1]:
        x = block(x, attn_mask=clip.attn_mask)
    assert relative_error(text_encoder(ids), clip.ln_final(x)) <= 1e-5


def test_a_prompt_over_77_tokens_is_encoded_in_pieces_and_nothing_is_lost(text_encoder):
    tokenizer = Tokenizer(77)
    words = [f"panda{i}" for i in range(60)]
    ids = tokenizer(" ".join(words))
    start, end = 49406, 49407
    assert len(ids) == 3
    kept = [token for row in ids.tolist() for token in row if token not in (start, end, 0)]
    assert kept == [token for word in words for token in tokenizer(word)[0].tolist() if token not in (start, end, 0)]
    assert all(row[0] == start and end in row for row in ids.tolist())

    (embeds,) = text_encoder.encode([ids])
    assert embeds.shape == (3 * 77, SMALL_TEXT_ENCODER.width)
    torch.testing.assert_close(embeds[77:154], text_encoder(ids[1:2])[0], rtol=1e-4, atol=1e-5)


def test_prompts_encoded_together_are_those_encoded_alone(text_encoder):
    tokenizer = Tokenizer(77)
    prompts = [tokenizer(PROMPTS[0]), tokenizer("word " * 100), tokenizer("")]
    for together, ids in zip(text_encoder.encode(prompts), prompts, strict=True):
        torch.testing.assert_close(together, text_encoder.encode([ids])[0], rtol=1e-4, atol=1e-5)


def test_several_prompts_make_no_copies_of_the_weights(text_encoder):
    """As torch's module does, one for each token: in half precision, two prompts took ten seconds."""
    ids = Tokenizer(77)(PROMPTS[0]).repeat(2, 1)
    half = copy.deepcopy(text_encoder).to(torch.bfloat16)
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as profiled:
        half(ids)
    operations = {event.name for event in profiled.events()}
    assert "aten::addmm" in operations
    assert "aten::bmm" not in operations


def test_an_endless_prompt_is_refused_by_its_number_of_tokens():
    with pytest.raises(InvalidRequest, match=r"prompt has 700 tokens: at most 600"):
        Tokenizer(77)("word " * 700)
