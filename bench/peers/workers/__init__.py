"""One file per server that is measured; each runs as a process of its own, in the environment of its peer.

They import nothing of ours but ``bench.peers.protocol``, which is standard library only; our own worker is the
exception.
"""
