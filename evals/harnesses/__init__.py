"""Other harnesses: answer files that they made, and lmms-eval with recipes of ours."""
