"""Learning from a pool without labels: an averaged teacher, its hard pseudo-labels, and two stages with a schedule each.

Pure pieces that the mean-teacher trainer and the omni-supervised pretraining share: :mod:`~nnssl.teacher.averaging`,
:mod:`~nnssl.teacher.pseudo_labels`, :mod:`~nnssl.teacher.components`, :mod:`~nnssl.teacher.stages` and
:mod:`~nnssl.teacher.changes`. Sources:
Tarvainen and Valpola 2017, arXiv:1703.01780 (mean teacher); Sohn et al. 2020, arXiv:2001.07685 (hard labels, a weak and a strong
view); Bai et al. 2023, arXiv:2305.00673 (largest component of each class).
"""
