"""The studies, by name."""

from experiments.studies import cache_quality

STUDIES = {study.name: study for study in (cache_quality.STUDY,)}
