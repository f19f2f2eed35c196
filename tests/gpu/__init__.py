"""What only a GPU can show: captured graphs, streams, more than 2^31 elements; and what `make gpu` runs tests with.

Each check is a function of device and size. Marked `cuda` it runs as it is meant; without the mark the same function
runs on the CPU, small and with calls in place of graphs and streams, so that it is known to work before a GPU is there.
"""
