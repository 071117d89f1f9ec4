"""Execution providers of phones: the forms that they take, and the rules that they document, checked node by node."""
