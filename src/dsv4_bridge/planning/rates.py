"""What estimates take for a GPU: operations and bytes a second, round numbers of an H100 with 400 Gbit/s of network.

Estimates rank and decide, they do not predict: only the ratios matter.
"""

RATE = 400e12  # operations of a GPU that is busy
INSIDE, BETWEEN = 300e9, 40e9  # bytes of its links in a node, and between nodes
LATENCY = 50e-6  # of messages there and back, seconds
