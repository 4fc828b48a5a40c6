"""Try r1hpc on a machine with GPUs: everything there is to see, in pieces of ten minutes.

    make gpu                                        # all pieces, one after the other; results.md
    make gpu PIECE=speed                            # one
    python -m benchmarks.gpu speed --device cpu     # the same in small, to see that the piece itself works

__main__   which pieces there are, in their order; a process for each
place      the device, the runs that are made on it, what the card and the libraries call themselves
table      what a piece leaves: figures with the words to read them by
page       results.md out of what the pieces left
the rest   the pieces: a function each, from a Place to its tables
"""
