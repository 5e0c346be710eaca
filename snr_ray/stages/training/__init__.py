"""Training on Ray: a data folder or images in, a run folder with a model out.

`train` is the verb, `setup` what it settles before, `worker` what every worker runs; `runlog` and
`tracker` are the curves, `pictures` the images of many sizes, `desk` a run folder in a bucket.
Read `train` first.
"""
