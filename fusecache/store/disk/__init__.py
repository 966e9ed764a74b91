"""The files of the store on the disk: their format, locks and ledger."""
