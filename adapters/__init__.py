"""Fitting the adapter of a new subject on a frozen backbone. (Another distribution on PyPI is named so, too.)"""
