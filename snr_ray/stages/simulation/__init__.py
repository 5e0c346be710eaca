"""Clean images -> rows with their noisy versions, as files or on the way to a stage.

`simulate` is the verb and the tasks; `dataset` brings rows, simulated or from a data folder, to
training, evaluation and sweeps. Read `simulate` first.
"""
