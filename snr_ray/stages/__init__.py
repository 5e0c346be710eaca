"""One module for each verb of `snr`, and what only they share; the only room that knows Ray.

`simulate`, `train`, `sweep`, `denoise`, `evaluate`, `bench` and `demo` are the verbs. `trainsetup`,
`trainworker` and `runlog` are what `train` does before, in and beside its workers, `benchjob` and
`benchstep` two of the measurements. `cluster` connects, `dataset` brings rows to training and
scoring. Under `denoise` lie `denoisejob`, which runs and counts, `bulk`, the engine, `cleaning`,
what nodes do, `imagefiles` and `fileswap`, files and the network without Ray, `manifest` and
`retrylist`, rows and failures. Stages talk through files. Read `denoise` first.
"""
