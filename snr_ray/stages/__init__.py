"""A module for each verb of `snr`, and what only they share; the only room that knows Ray.

Under `train` lie `trainsetup`, `trainworker` and `runlog`; under `denoise` `denoisejob`, `bulk`,
the engine, `cleaning`, `imagefiles`, `fileswap`, `manifest`, `retrylist` and `room`; under
`evaluate` `scoretask`; under `plan` `planrates` and `forecast`. `cluster` connects, `counters`
tells Prometheus, `dataset` brings rows. Stages talk through files. Read `denoise` first.
"""
