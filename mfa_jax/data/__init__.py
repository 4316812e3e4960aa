"""From text to batches: sources, tokenizers, token shards, the grain pipeline."""

from mfa_jax.data.pipeline import Batch, Batches, eval_batches, make_loader
from mfa_jax.data.prepare import prepare
from mfa_jax.data.shards import Prepared, SplitSize, open_prepared
from mfa_jax.data.sources import Document, documents
from mfa_jax.data.streaming import StreamDecoder
from mfa_jax.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "Batch", "Batches", "ByteTokenizer", "Document", "HuggingFaceTokenizer", "Prepared", "SplitSize", "StreamDecoder",
    "Tokenizer", "documents", "eval_batches", "load_tokenizer", "make_loader", "open_prepared", "prepare",
]
