"""What every stage has as a job of Ray: a cluster, its inputs, an end that is told.

`connection` finds or starts Ray, `inputs` opens the images, `submitted` says what a job may name;
`pools` asks an autoscaler for nodes, `waiting` tells what is waited for, `counters` tell
Prometheus. Read `connection` first.
"""
