"""What nnU-Net finds through ``nnUNet_extTrainer``: the trainers of the installed package, under their names.

nnU-Net imports this file as a top-level module and forgets it afterwards. The classes come from :mod:`nnssl.trainers`,
so that they are the same objects at each look-up and can be pickled. An unimportable package must not end the search.
"""

import warnings

try:
    from nnssl import trainers

    globals().update({name: getattr(trainers, name) for name in trainers.TRAINERS})
except ImportError as error:
    warnings.warn(f"The trainers of nnssl cannot be imported: {error}. See: nnssl_trainers", stacklevel=1)
