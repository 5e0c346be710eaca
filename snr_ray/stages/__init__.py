"""The verbs of `snr`, each in a room with what only it needs; the only rooms that know Ray.

`job` is what all of them share; then `simulation`, `denoising`, `training`, `evaluation`,
`sweeping` and `measuring` (`bench` and `plan`). A verb that needs no room lies here:
`reconstruct`, and `demo`, which runs them all. Stages talk through files.
Read `denoising` first.
"""
