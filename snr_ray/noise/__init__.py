"""What noise is: clean images in, filtered back projections of few views out.

`operator` builds it for one noise spec and image shape and applies it to arrays, `rows` are its
compiled products, `tensors` the same with gradients on any device, `lmmse` the linear estimate that
undoes it best, `likelyviews` what a spectrum says of the view count. Read `operator` first.
"""
