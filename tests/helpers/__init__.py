"""What tests share: small models of all kinds, exports of them, and ways to run both sides and compare."""
