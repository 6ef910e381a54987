"""Prompts to text embeddings, by OpenCLIP's text tower and its tokenizer.

A prompt longer than the tower's 77 tokens is cut into pieces that are encoded apart and joined: nothing is lost.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from t2v_core.config import TextEncoderConfig
from t2v_core.errors import InvalidRequest

PADDING_ID = 0  # the UNet attends to padding, so this is part of the model
MAX_CHUNKS = 8
_MAX_CACHED_WORDS = 50_000


class Tokenizer:
    """OpenCLIP's byte-pair encoding. The one in transformers differs: no ftfy clean-up, "!" for padding."""

    def __init__(self, context_length: int) -> None:
        # Not at the top: open_clip brings torchvision and timm, seconds that `t2v --help` should not wait for.
        from open_clip.tokenizer import SimpleTokenizer

        self._bpe = SimpleTokenizer(context_length=context_length)
        self._context_length = context_length

    def __call__(self, prompt: str, param: str = "prompt") -> Tensor:
        """Token ids, one row of 77 for each 75 tokens of the prompt: (chunks, 77), int64. "" gives one row.

        Raises InvalidRequest, which names `param`, for a prompt of more than 8 rows.
        """
        if len(self._bpe.cache) > _MAX_CACHED_WORDS:  # else it keeps every word that anybody ever sent
            self._bpe.cache = {token: token for token in ("<start_of_text>", "<end_of_text>")}
        per_chunk = self._context_length - 2
        tokens = self._bpe.encode(prompt)
        if len(tokens) > MAX_CHUNKS * per_chunk:
            raise InvalidRequest(
                f"{param} has {len(tokens)} tokens: at most {MAX_CHUNKS * per_chunk} are allowed; shorten it",
                param=param,
            )
        pieces = [tokens[i : i + per_chunk] for i in range(0, len(tokens), per_chunk)] or [[]]
        ids = torch.full((len(pieces), self._context_length), PADDING_ID, dtype=torch.long)
        for row, piece in zip(ids, pieces, strict=True):
            row[: len(piece) + 2] = torch.tensor([self._bpe.sot_token_id, *piece, self._bpe.eot_token_id])
        return ids


class TextEncoder(nn.Module):
    """CLIP's text tower up to the layer that the UNet was trained on, then its final norm."""

    def __init__(self, config: TextEncoderConfig) -> None:
        from open_clip.transformer import TextTransformer

        super().__init__()
        self.config = config
        self.tower = TextTransformer(
            context_length=config.context_length,
            vocab_size=config.vocab_size,
            width=config.width,
            heads=config.heads,
            layers=config.layers,
            mlp_ratio=config.mlp_width / config.width,
            output_dim=None,
            no_causal_mask=True,
        )

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids: (b, 77) -> (b, 77, d)."""
        x = self.tower.token_embedding(token_ids) + self.tower.positional_embedding[: token_ids.shape[1]]
        for block in self.tower.transformer.resblocks:
            x = x + _attend(block.attn, block.ln_1(x))
            x = x + block.mlp(block.ln_2(x))
        return self.tower.ln_final(x)

    def encode(self, token_ids: Sequence[Tensor]) -> list[Tensor]:
        """The embeddings of several tokenised prompts, in one batch. Each (chunks, 77) -> (chunks * 77, d)."""
        device = self.tower.positional_embedding.device
        rows = self(torch.cat([ids.to(device) for ids in token_ids]))
        parts = rows.split([len(ids) for ids in token_ids])
        return [rearrange(part, "chunks n d -> (chunks n) d") for part in parts]


def _attend(attention: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """Each token to those up to it. (b, n, d), same shape out.

    Not by calling the module, which lays tokens first: in half precision on a CPU, torch then copies the weight for
    each of them, and two prompts take ten seconds.
    """
    qkv = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = rearrange(qkv, "b n (three heads c) -> three b heads n c", three=3, heads=attention.num_heads)
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return attention.out_proj(rearrange(attended, "b heads n c -> b n (heads c)"))
