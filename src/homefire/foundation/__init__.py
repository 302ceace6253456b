"""What every process needs and no word of the field names. Imports only `homefire.wire`."""
