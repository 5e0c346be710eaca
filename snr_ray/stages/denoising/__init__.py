"""Bulk denoising: any number of images in, each exactly once under its own name out.

`denoise` is the verb, `denoisejob` one run of it; `bulk` is the engine, `cleaning` its tasks and
GPU actors, `imagefiles` and `fileswap` what they do to files and to stacks of pixels; `manifest`
and `retrylist` say what is done and what is to do. Read `denoise` first.
"""
