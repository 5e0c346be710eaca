"""Where images come from and go to.

`formats` turns files into pixels and back, by `raster`, `tiff`, `dicom`, `nifti` and `omezarr`, for
folders with `zarrfolder`; `collection` numbers, names and splits images; `sources` opens what the
user typed, by `places`, `listing`, `files` and `tables`; `samples` draws images, `datafolder` holds
what was simulated. Read `collection` first. No torch.
"""
