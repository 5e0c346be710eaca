"""What a model is worth: every method on the same images, and the pages that show it.

`methods` has an entry for each method: key, label, how it is computed; `scores` runs them on every
case, `baselines` are total variation, SART and their fitting, `probes` ask what the codes know and
whether injected noise passes for true. `report` and `grids` show an evaluation, `jobpage` a
denoising job, `runpage` a training run. Read `methods` first.
"""
