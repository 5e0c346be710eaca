"""What models are worth on the test split of a source, beside baselines.

`evaluate` is the verb and writes tables and pictures; `scoretask` gets the scores as Ray tasks.
Read `evaluate` first.
"""
