"""The paper's questions, asked of our own runs: one folder per study, one runner. README.md says how."""
