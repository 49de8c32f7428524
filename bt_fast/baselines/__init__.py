"""The methods that BulletTrain is compared with."""
