"""One module for each verb of `snr`, and what only they share; the only room that knows Ray.

`simulate`, `train`, `sweep`, `denoise`, `evaluate`, `bench` and `demo` are the verbs. `trainsetup`,
`trainworker` and `runlog` are what `train` does before, in and beside its workers, `benchjob` and
`benchstep` two of the measurements. `cluster` connects, `dataset` brings rows to training and
scoring, `fileswap` is what a task of `denoise` does to image files. Stages talk through files. Read
`denoise` first.
"""
