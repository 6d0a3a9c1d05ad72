"""The paper's benchmarks as tasks of lm-evaluation-harness: XQuAD, MLQA, IndicQA and MGSM.

A task is a small YAML that includes what its benchmark's tasks share (`_xquad`, `_mlqa`, `_indicqa`,
`_mgsm`); its prompt's words are a row of `words.json`, its documents come from `documents.py` and its scores
from `scores.py`.
"""
