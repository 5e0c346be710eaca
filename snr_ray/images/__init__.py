"""Where images come from and go to.

`formats` turns files into pixels and back; `collection` numbers, names and splits images, by
`groups`; `sources` opens what the user typed, by `places`, `listing`, `files` and `tables`;
`samples` draws images, `scans` reads sinograms, `datafolder` holds what was simulated. Read
`collection` first. No torch.
"""
