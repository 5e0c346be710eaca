"""What noise is: clean images in, filtered back projections of few views out.

`operator` builds it for one noise spec and image shape and applies it to arrays: `rays` are its
compiled loops, `sums` what they end in, `turns` what spares few large images most of them.
`tensors` is the same with gradients on any device, `kernels` on a GPU. `lmmse` is the linear
estimate that undoes it best, `likelyviews` what a spectrum says of the view count. Read `operator`
first.
"""
