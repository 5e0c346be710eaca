"""How the model learns: batches -> losses -> steps -> states on disk and a model folder.

`batches` takes training pairs from memory, `shardfeed` from the shards of larger sets, `mixed` of
many sizes; `losses` is the objective, `muon` the optimizer, `learner` the step, `fit` the loop,
`health` when to give up; `restart` is what a broken run goes on from, `checkpoint` the model
folder. Read `losses` first, then `learner`. Runs without Ray.
"""
