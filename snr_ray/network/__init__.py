"""The model and what it does: image -> content and noise codes -> image.

`hvae` is the model, of the parts in `blocks`; `noisemaker` is the noise operator as its last layer,
`physics` a linear estimate as its second input, `swap` the exchange of noise codes, `unet` and
`itnet` the supervised baselines. Read `hvae` first, then `swap`.
"""
