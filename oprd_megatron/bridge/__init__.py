"""The low-rank bridge of two models (OPRD-Bridge): how it is fitted, kept in a file and checked."""
