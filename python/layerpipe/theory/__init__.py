"""A pipeline on paper: where delays come from, what a schedule gives, where to cut.

:mod:`~layerpipe.theory.retiming` derives the delays from the training graph, :mod:`~layerpipe.theory.simulate` runs
tasks on processors, and :mod:`~layerpipe.theory.planning` finds cuts, memory and throughput of a model. Training needs
none of it: :mod:`layerpipe.schedule` has the closed forms, which tests compare with these.
"""
