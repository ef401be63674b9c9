"""What FedRx uses of its dependencies beyond what they document: one module per library.

Flower's are in ``common.wire``. Such a name may change in any release. Each module says which
versions it was seen in, and ``tests/test_undocumented.py`` refuses one that is used anywhere else.
"""
