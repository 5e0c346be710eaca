"""What a model is worth: every method on the same images, and the pages that show it.

`scores` runs the model and what it is compared with, `baselines` are total variation and SART,
`probes` ask what the codes know and whether injected noise passes for true, `report` draws tables
and pictures. Read `scores` first.
"""
