"""Compiled CUDA kernels without a GPU: ``python -m bench.sass`` runs the machine code that ptxas made, and counts.

To read in this order: ``cases.py`` what is run; ``launches.py`` the launches and the memory of a case, as the plan
makes them on the CPU; ``toolchain.py`` and ``disassembly.py`` the compiled kernels; ``warp.py`` one warp of them, with
the instructions in ``integer.py``, ``floating.py``, ``double.py`` and ``control.py``; ``timing.py`` and
``scheduler.py`` the model of what would wait for what.
"""
