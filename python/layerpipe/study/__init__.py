"""Studies of asynchronous pipelines: exact simulations of delayed training, and studies made of them.

:mod:`~layerpipe.study.training` trains with the delays of a pipeline in one process, without the engine;
:mod:`~layerpipe.study.methods` names what others and we do about delays; ``layerpipe study`` runs grids of both.
"""
