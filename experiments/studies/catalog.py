"""The studies, by name."""

from experiments.studies import cache_quality, factorization, key_reuse_start, long_context, positions, scaling

STUDIES = {study.name: study for study in (
    cache_quality.STUDY, factorization.STUDY, key_reuse_start.STUDY, positions.STUDY, scaling.STUDY,
    long_context.STUDY)}
