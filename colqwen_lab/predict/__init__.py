"""What a device would do, told without one: peak memory, the ledger of its bytes, the roofline, the cards."""
