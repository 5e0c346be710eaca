"""Where images come from and go to.

`formats` turns files into pixels and back, with a module for each (`raster`, `tiff`, `dicom`,
`nifti`); `collection` numbers, names and splits images; `sources` opens what the user typed, by
`places`, `listing`, `files` and `tables`; `samples` draws images that need no download,
`datafolder` holds what was simulated. Read `collection` first. No torch.
"""
