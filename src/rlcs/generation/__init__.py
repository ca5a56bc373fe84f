"""Samplers, which answer requests with any model, and the log on disk that keeps their samples."""

from rlcs.generation.cached_sampler import CachedSampler
from rlcs.generation.sample_log import Entry, SampleLog, annotate, check_settings
from rlcs.generation.sampler import EngineSampler, Sampler, open_sampler

__all__ = [
    "CachedSampler",
    "EngineSampler",
    "Entry",
    "SampleLog",
    "Sampler",
    "annotate",
    "check_settings",
    "open_sampler",
]
