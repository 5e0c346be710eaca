"""The search of the split: an Optuna study whose trials are training runs.

`sweep` is the verb; `study` says what is searched, `objectives` what for, `trial` runs one,
`storage` keeps the study, `confirm` asks other seeds, `page` shows what was found.
Read `sweep` first.
"""
