"""The pooled store: ``docs/store-format.md`` is its specification."""

from data.store.pooled import PooledStore
from data.store.subjects import SubjectStore
from data.store.tokens import NamedTokens, TokenBatch, TokenReader

__all__ = ["NamedTokens", "PooledStore", "SubjectStore", "TokenBatch", "TokenReader"]
