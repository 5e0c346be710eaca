"""Where images come from and go to.

`formats` turns files into pixels and back, `collection` numbers, names and splits images, `files`
lists folders, tables and buckets, `samples` draws images that need no download, `sources` opens
what the user typed, `datafolder` holds what was simulated. Read `collection` first. No torch.
"""
