"""What nnU-Net finds through ``nnUNet_extTrainer``: the trainers of the installed package, under their names.

nnU-Net imports this file as a top-level module and forgets it afterwards. The classes come from :mod:`nnssl.trainers`,
so that they are the same objects at each look-up and can be pickled. An unimportable package must not end the search. What
they refuse ends the command in one message.
"""

import warnings

try:
    from nnssl import trainers
    from nnssl.trainers.refusals import tell_refusals_briefly

    globals().update({name: getattr(trainers, name) for name in trainers.TRAINERS})
    tell_refusals_briefly()
except ImportError as error:
    warnings.warn(f"The trainers of nnssl cannot be imported: {error}. See: nnssl_trainers", stacklevel=1)
