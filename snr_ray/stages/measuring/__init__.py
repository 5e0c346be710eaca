"""How fast it all is on this machine, and what a job will take.

`bench` is a verb, with a module for each thing that is measured beside a bare loop; `plan` is
another: `planrates` measures small jobs, `forecast` reckons large ones. Read `bench` first.
"""
