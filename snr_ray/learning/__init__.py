"""How the model learns: batches -> losses -> steps -> checkpoints and a model folder.

`batches` takes training pairs from memory, `shardfeed` from the shards of larger sets; `losses` is
the objective, `muon` the optimizer, `fit` the step and the loop, `checkpoint` what stays on disk.
Read `losses` first, then `fit`. Runs without Ray.
"""
