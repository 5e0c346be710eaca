"""What the numbers of one file mean, and files of such numbers again.

`codec` knows formats by their first bytes; `raster`, `tiff`, `dicom`, `nifti` and `omezarr` obey
what each says of its numbers, `pixels` makes images of them; `headers` and `memory` say what is too
large, `errors` why a file cannot be read. Read `codec` and `pixels` first.
"""
