"""What noise is: clean images in, filtered back projections of few views out.

`operator` does it for one noise spec and image shape on arrays: `rays` are its compiled loops,
`turns` spares few large images most of them. `tensors` is the same with gradients on any device,
`kernels` on a GPU. `lmmse` is the linear estimate that undoes it best, `likelyviews` what a
spectrum says of the view count. Read `operator` first.
"""
